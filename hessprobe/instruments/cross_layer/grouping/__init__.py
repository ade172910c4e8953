"""Which layers a preconditioner should join, from the stored kernels."""
