"""The packages that the formats come from, each in an isolated environment: readers to judge by, and other builders."""
