"""Recognise models in single files, in the layouts of ComfyUI, by their content, and load them exactly."""
