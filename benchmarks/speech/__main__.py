"""``python -m benchmarks.speech``."""

from benchmarks.speech.running import main

if __name__ == "__main__":
    main()
