"""Images to listen with: noise, two photographs that ship with scikit-learn, or a folder."""

from normfree.data.probe import GaussianNoise, ImageFolder, Photographs, Probe, probe_named

__all__ = ["GaussianNoise", "ImageFolder", "Photographs", "Probe", "probe_named"]
