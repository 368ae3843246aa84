"""Generated graphs whose truth is known: is any answer ever changed by company, or by a copy's weights?"""
