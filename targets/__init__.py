"""Networks into files into measurements: exporters, runtimes, verification, devices."""
