"""Files of the studio's page: uploads, their routes, and the check of its requests."""
