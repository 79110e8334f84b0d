"""What the detector stands on: files, pictures, processes, exported networks. It imports nothing of the top."""
