"""What an exchange costs, in passes over memory."""
