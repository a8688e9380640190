"""Parts put together in memory: backbone, patch, codec, captions."""
