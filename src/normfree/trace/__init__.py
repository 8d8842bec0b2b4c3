"""Run a model once, leave it as it was, and keep its dataflow. torch alone."""

import normfree.signal  # noqa: F401 - until the recorder no longer takes its moments from there
