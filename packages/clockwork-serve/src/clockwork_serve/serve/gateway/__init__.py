"""What both ports share: requests on their way to the controller and back, access, tensor memory."""
