"""The probe in other people's training loops: any script, and callbacks of an extra's name."""
