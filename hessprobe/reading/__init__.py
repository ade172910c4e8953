"""What reading any table needs: rows, statistics, words."""
