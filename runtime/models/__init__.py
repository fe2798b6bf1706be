"""Model families as chains of plain torch modules. Only the submitter imports them; workers run Programs."""
