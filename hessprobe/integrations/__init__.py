"""The recorder inside other people's trainers; each file needs its own library, and names it where it is missing."""
