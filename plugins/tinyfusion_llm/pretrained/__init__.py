"""What all networks of transformers share: they are read, checked and saved here."""
