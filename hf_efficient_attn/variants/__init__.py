"""One file per variant; importing it registers it. A new variant adds its line here."""
