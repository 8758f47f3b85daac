"""The commands by family: each beside what it prints. What they do lies in pipeline/, stages/ and storage/."""
