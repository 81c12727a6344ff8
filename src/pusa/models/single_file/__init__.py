"""Wan's models in single files, in the layouts of ComfyUI: recognise them by their content, and load them exactly."""
