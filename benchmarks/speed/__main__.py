"""``python -m benchmarks.speed``."""

from benchmarks.speed.running import main

if __name__ == "__main__":
    main()
