"""``python -m benchmarks.guides``."""

from benchmarks.guides.running import main

if __name__ == "__main__":
    main()
