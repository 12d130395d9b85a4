"""``python -m benchmarks.nuts``."""

from benchmarks.nuts.running import main

if __name__ == "__main__":
    main()
