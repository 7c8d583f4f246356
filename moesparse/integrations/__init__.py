"""What other libraries load: each module here imports the library it is named after."""
