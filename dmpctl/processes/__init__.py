"""One command, many processes: device, ranks, launcher, signals."""
