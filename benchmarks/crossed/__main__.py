"""``python -m benchmarks.crossed``."""

from benchmarks.crossed.running import main

if __name__ == "__main__":
    main()
