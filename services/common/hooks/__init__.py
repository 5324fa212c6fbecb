"""What the chart runs beside the servers: Secrets made once, a look at all of it, and the end of what still runs."""
