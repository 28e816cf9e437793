"""Operations on tokens: attention, rotary embedding, norms; plain, and by Triton where it pays."""
