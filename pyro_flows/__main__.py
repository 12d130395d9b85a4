"""``python -m pyro_flows``: the command ``pyro-flows``."""

from pyro_flows.cli import main

if __name__ == "__main__":
    main()
