"""Generated from proto/parameter_server.proto by proto/generate.sh; not edited by hand."""
