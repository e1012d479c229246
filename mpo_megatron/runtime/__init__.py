"""Where the job runs: processes, devices, and the parallel layout."""
