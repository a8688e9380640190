"""ONE settings model for all commands: its sections, its layers, its presets. No torch here."""
