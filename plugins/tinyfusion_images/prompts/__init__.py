"""How well pictures show what they were asked for."""
