"""The figures of papers as fractions, each equal to the scorer that its papers used."""
