"""``python -m benchmarks.priors``: chains of batches."""

from benchmarks.priors.chains import main

if __name__ == "__main__":
    main()
