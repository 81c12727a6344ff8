"""Mark results in ways that machines read: XMP, C2PA manifests and watermarks; read such marks of any file.

xmp            the packet: digital source type, AI system and version, marks of the inputs
marks          marks that a file carries already
c2pa           sign a file with a certificate, read and verify its manifests: needs pusa[c2pa]
certificates   make a root and a signing certificate of one's own
watermark      embed bits in the frames and detect them; marks of others are registered here
"""
