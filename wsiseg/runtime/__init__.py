"""What a run needs of the machine: claims, whole files, processes, time and memory."""
