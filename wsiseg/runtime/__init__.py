"""Services of the machine: claims, atomic files, processes, time and memory."""
