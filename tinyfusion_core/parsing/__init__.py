"""What comes in from outside, checked: settings, YAML, files that we have written."""
