"""Generated graphs whose truth is known: whether company or a copy's weights ever change an answer."""
