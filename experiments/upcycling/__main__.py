"""Run the experiment."""

from experiments.upcycling.run import main

if __name__ == "__main__":
    main()
