"""Run a model once, leave it as it was, and keep its dataflow. torch alone."""
