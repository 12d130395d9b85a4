"""``python -m benchmarks.larger``."""

from benchmarks.larger.running import main
from benchmarks.tables import write_tables

if __name__ == "__main__":
    write_tables(larger_csv=main())
