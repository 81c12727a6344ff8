"""Recognise the files that people have of Wan's models: folders, single files, ComfyUI's folder, published ones."""
