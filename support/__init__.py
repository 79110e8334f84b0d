"""What the detector stands on: files, pictures, videos, processes, exported networks. Imports no top."""
