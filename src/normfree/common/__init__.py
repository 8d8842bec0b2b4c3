"""What all packages share: argument checks, error texts, files, optional packages, memory."""
