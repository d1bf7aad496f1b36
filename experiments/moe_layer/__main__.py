"""Run the experiment."""

from experiments.moe_layer.run import main

if __name__ == "__main__":
    main()
