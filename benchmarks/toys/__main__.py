"""``python -m benchmarks.toys``."""

from benchmarks.toys.running import main

if __name__ == "__main__":
    main()
