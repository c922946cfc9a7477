"""Live sessions over WebSocket, and the page: protocol, video, viewer, app. Needs the extra `serve`."""
