package azsecrets

type Secret struct{ Value *string }
