"""What the detector stands on: files, pictures, processes, exported networks. Imports nothing of the top."""
