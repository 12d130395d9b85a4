"""``python -m benchmarks.calibration``."""

from benchmarks.calibration.running import main

if __name__ == "__main__":
    main()
