"""``python -m benchmarks.larger``."""

from benchmarks.larger.running import main

if __name__ == "__main__":
    main()
