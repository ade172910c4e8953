"""What is drawn, and with which pen."""
