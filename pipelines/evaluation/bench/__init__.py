"""LiveEdit-Bench: any system's edits of the 120 clips of `data.bench`, in figures and pictures."""
